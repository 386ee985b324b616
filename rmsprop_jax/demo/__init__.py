"""Train a recurrent network on handwritten digits: an example to copy from.

`python -m rmsprop_jax` runs it. `train.py` has the loop, `data.py` images and model.
"""
