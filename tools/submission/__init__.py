"""The commands of tools/submit.py, each by arguments(argv) and run(args) of its module, and what they share."""
