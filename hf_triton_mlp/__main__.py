"""python -m hf_triton_mlp, which torchrun needs: the command line."""

from hf_triton_mlp.cli import main

if __name__ == "__main__":
    main()
