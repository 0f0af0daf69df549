"""Faster implementations of rSkip. Importing this package lets [`RSkip`] use them; the models themselves need none."""

from ..models import skip_connections
from .hook import fused_rskip
from .rskip import rskip_layer_norm, rskip_rms_norm

skip_connections.fused = fused_rskip

__all__ = ["rskip_layer_norm", "rskip_rms_norm"]
