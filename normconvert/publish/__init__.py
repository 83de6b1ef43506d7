"""Push: a converted checkpoint onto the Hub, with a card that says what was done to it."""

from normconvert.publish.upload import PushError, Upload, push, require_possible

__all__ = ["PushError", "Upload", "push", "require_possible"]
