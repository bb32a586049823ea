"""Training: `python -m fastsr.train CONFIG` for every network, and ZSSR, which learns from the image that it enlarges.

Nothing here is imported unless it is asked for: enlarging needs none of it, but for ZSSR.
"""
