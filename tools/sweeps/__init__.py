"""What tools/sweep.py is made of: the plan, the runs, who makes them, the time of a step, and the table."""
