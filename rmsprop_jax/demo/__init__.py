"""Train a recurrent network on handwritten digits: an example to copy from.

Run it with `python -m rmsprop_jax`. `data.py` has the images and the model, `train.py`
the loop; `checkpoints.py`, `report.py`, `config.py` and `cli.py` support it.
"""
