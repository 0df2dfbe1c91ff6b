"""How a distiller is attached to a LightningModule for the length of a fit, and taken off again."""

from lightning_kd.attachment.attachment import Attachment, attachments_of
from lightning_kd.attachment.labels import Label, label_sources, refuse_unasked

__all__ = ["Attachment", "Label", "attachments_of", "label_sources", "refuse_unasked"]
