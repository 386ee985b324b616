"""Checkpoints with Orbax, restored with the shardings of the state they replace."""

import orbax.checkpoint as ocp


class Checkpoints:
    """Save and restore checkpoints of a run in a folder, keeping the last two."""

    def __init__(self, folder):
        """Open the folder, creating it if necessary."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step, state):
        """Save the state after a step, unless it is already saved."""
        self.manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state):
        """Restore the newest step and its state, or return 0 and `state` if none."""
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
