from .graph import CaptureError as CaptureError

__all__ = [
    "CaptureError",
]
