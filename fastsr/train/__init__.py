"""Training: so far the zero-shot procedure of `fastsr.train.zssr`, which learns from the image it enlarges."""
