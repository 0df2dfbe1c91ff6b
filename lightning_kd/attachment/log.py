"""What is logged of the losses of a step."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class Log:
    """Keeps a step's values until the hook in which they are logged.

    Args:
        prog_bar: Whether the progress bar shows them.
    """

    def __init__(self, prog_bar: bool) -> None:
        self.prog_bar = prog_bar
        self.values: dict[str, Tensor | float] = {}
        self._logged: set[str] = set()

    def clear(self) -> None:
        """Forgets what was logged: another fit begins."""
        self.values, self._logged = {}, set()

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the values, except under names that the module's own training_step logs."""
        values, self.values = self.values, {}
        if trainer.barebones:  # in which whoever logs is warned
            return
        results = [result.meta for result in (trainer._results or {}).values()]
        # Those of this hook may be ours, of an earlier fit of this trainer.
        own = {meta.name for meta in results if meta.fx != "on_before_backward"}
        ours = {name: value for name, value in values.items() if name not in own or name in self._logged}
        self._logged |= ours.keys()
        # Nothing is averaged over an epoch, so the size does not matter; some batches do not tell it.
        pl_module.log_dict(ours, prog_bar=self.prog_bar, batch_size=1)
