"""The cost model: predicted times of kernels (roofline), of what Inductor would do (baseline), and where one overtakes
another in a symbolic size (crossover). Efficiencies are data."""
