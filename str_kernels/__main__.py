"""`python -m str_kernels`: the command line, as torchrun starts it (`torchrun -m str_kernels`)."""

from str_kernels.cli.main import main

if __name__ == "__main__":
    main()
