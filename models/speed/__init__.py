"""How a loaded codec is made to run fast, which changes no symbol: precision, layouts, CUDA graphs."""
