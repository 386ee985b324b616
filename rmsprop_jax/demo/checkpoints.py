"""Checkpoints with Orbax, restored with the shardings of the state they replace."""

import orbax.checkpoint as ocp


class Checkpoints:
    """The last two checkpoints of a run, in a folder."""

    def __init__(self, folder):
        """Open the folder, creating it if need be."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step, state):
        """Save the state after a step, unless it is saved already."""
        self.manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state):
        """Return the newest step and its state; 0 and `state` if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state
        try:
            return step, self.manager.restore(
                step, args=ocp.args.StandardRestore(state)
            )
        except Exception as error:
            raise SystemExit(
                f"error: cannot restore {self.manager.directory / str(step)}; delete "
                f"it to resume from the one before. {' '.join(str(error).split())}"
            ) from error
