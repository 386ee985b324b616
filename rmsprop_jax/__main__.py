"""Run the demo: `python -m rmsprop_jax --help`."""

from rmsprop_jax.demo.cli import main

raise SystemExit(main())
