"""A cache of the teacher's answers, for a run that knows nothing of it."""

from lightning_kd.attachment.caching import Caching


class TeacherCache(Caching):
    """Lets a trained teacher run once per sample: its answers are written to disk, and read from then on.

    It stands beside whatever distils, ``Distillation`` or a ``DistillationModule``, in any order, and for the length
    of a fit puts ``teachers.Cached`` in the teacher's place. The first epoch asks the teacher; each epoch after it, and
    each run after this, reads. All processes of a run write and read the same folder. A run of one batch,
    ``fast_dev_run``, leaves the folder alone.

    Args:
        folder: Where the answers are, or will be; one for each teacher, data and wiring.
        storage: How tensors are stored; see ``teachers.Cached``.
        fill_only: Whether to make the answers that lack, and nothing else: the student is not even run. In one process.

    Raises:
        ValueError: When a fit begins, if there is not one teacher to be cached; see also ``teachers.Cached``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_kd import Distillation, Term, losses
        >>> distillation = Distillation(teacher=torch.nn.Linear(32, 2), terms={"kd": Term(losses.KD())})
        >>> trainer = Trainer(callbacks=[distillation, TeacherCache("teacher_cache")])
    """
