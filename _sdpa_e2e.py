import torch, sys
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
import torch._functorch.config as fcfg
import fusion_compiler
from fusion_compiler.attention import find_attention
from fusion_compiler.lowering.vendor.sdpa import VendorSdpa
from fusion_compiler.machine import machine
from fusion_compiler.splice import Builder, clean, fit, replace
dev="cuda" if torch.cuda.is_available() else "cpu"
chosen=[]
def inner(gm, ex, **kw):
    ms,near=find_attention(gm)
    for n in near: print("   near:",n.reason)
    for m in ms:
        c=VendorSdpa().candidates(m.op,machine("h200" if dev=="cuda" else "cpu"))
        if not isinstance(c,list): print("   refused",c.reason); continue
        best=min(c,key=lambda x: float(x.seconds)); chosen.append(best.name)
        print("   ",m.op.mask.kind,m.op.mask.position,[(x.name,round(float(x.seconds)*1e6,1)) for x in c])
        b=Builder(gm,m.site.output); replace(m.site,fit(b,m.site,best.emit(b,m.site)))
    clean(gm)
    return compile_fx_inner(gm, ex, **kw)
def be(gm, ex, **kw):
    with fcfg.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False): return compile_fx(gm, ex, inner_compile=inner)
def t(f):
    for _ in range(3): f()
    torch.cuda.synchronize(); ts=[]
    for _ in range(15):
        a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); f(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b)*1e3)
    return sorted(ts)[7]
sys.path.insert(0,"tests")
import attention_spellings as sp
from test_attention import cached
def H(b,h,hk,lq,lk,d,dt): return [torch.randn(b,n,s,d,dtype=dt,device=dev) for n,s in ((h,lq),(hk,lk),(hk,lk))]
torch.set_default_device(dev)
def go(name,fn,args,first=lambda x:x):
    print(name,flush=True)
    with torch.no_grad():
        torch._dynamo.reset(); f=torch.compile(fn,backend=be); ours=first(f(*args))
        ref=first(fn(*[a.double() if a.is_floating_point() else a for a in args])); eager=first(fn(*args))
        print("   err ours %.2e eager %.2e"%((ours.double()-ref).abs().max(),(eager.double()-ref).abs().max()), "stride",ours.stride()==eager.stride(), flush=True)
        if dev=="cuda":
            torch._dynamo.reset(); g=torch.compile(fn); g(*args); print("   us ours %.1f eager %.1f inductor %.1f"%(t(lambda:f(*args)),t(lambda:fn(*args)),t(lambda:g(*args))),flush=True)
bf=torch.bfloat16
S=(1024 if dev=="cuda" else 64)
go("causal gqa bf16",lambda q,k,v: sp.repeated_by_expand(sp.compared_positions,q,k,v),H(2,8,2,S,S,64,bf))
go("causal odd 333",lambda q,k,v: sp.repeated_by_expand(sp.masked_fill_triu,q,k,v),H(2,8,2,333,333,64,bf))
go("fp32 causal",lambda q,k,v: sp.plain(sp.masked_fill_triu,q,k,v),H(2,8,8,333,333,64,torch.float32))
def window(q,k,v):
    d=torch.arange(q.shape[2])[:,None]-torch.arange(k.shape[2])[None]
    return sp.repeated_by_expand(lambda q,k,v: sp.scores(q,k).masked_fill((d<0)|(d>=40),float("-inf")).softmax(-1)@v,q,k,v)
go("window bf16",window,H(2,8,2,333,333,64,bf))
go("window fp32",lambda q,k,v: window(q,k,v),H(2,8,8,333,333,64,torch.float32))
L=4096 if dev=="cuda" else 64
go("static cache decode",cached,[*H(2,8,2,1,1,64,bf),*H(2,8,2,1,L,64,bf)[1:],torch.tensor(L//2)],first=lambda o:o[0])
go("static cache chunk",cached,[*H(2,8,2,5,5,64,bf),*H(2,8,2,1,L,64,bf)[1:],torch.tensor(L//2)],first=lambda o:o[0])
print(chosen)
