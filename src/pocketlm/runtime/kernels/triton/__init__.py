"""Our own CUDA products, written in Triton with explicit layouts (Gluon)."""
