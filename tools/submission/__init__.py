"""The commands of tools/submit.py, a module each: arguments(argv) reads its options, run(args) does it."""
