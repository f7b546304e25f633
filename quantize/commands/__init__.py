"""The commands of `quantize`, a file each; each has `main(argv)`, which returns the exit code.

They parse, call the package and print; `quantize/cli.py` has the table of them.
"""
