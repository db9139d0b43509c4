"""The measurements of tools/bench.py: a module for each of its commands, and what they share."""

from common import load_trainer

load_trainer()  # first: its environment must be there before torch is imported
