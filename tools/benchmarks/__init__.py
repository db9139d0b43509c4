"""The measurements of tools/bench.py: a module for each of its commands, and what they share."""
