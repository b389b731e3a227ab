"""Private and unstable APIs of torch and triton, one module per API, so that a new release breaks one small file."""
