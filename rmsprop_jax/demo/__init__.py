"""Train a recurrent network to read handwritten digits: a program to copy from.

Run it with `python -m rmsprop_jax`. `data.py` has the images and the model, `train.py`
the loop; `checkpoints.py`, `report.py`, `config.py` and `cli.py` are around it.
"""
