"""What a stranger reads first."""

from __future__ import annotations

from typing import Final

__all__ = ["WELCOME"]

WELCOME: Final = """\
fastvgg turns images into the exact bits that a pretrained network expects,
and back into the exact images.

See it on real photographs (needs: pip install 'fastvgg[demo]'):
  fastvgg demo demo/
Turn a directory of images into network input; with --dry-run, only plan it:
  fastvgg preprocess photos/ train.npy --model vgg19 --size 224 224
Turn it back into image files:
  fastvgg restore train.npy images/
Prove it, or ask what it is:
  fastvgg verify train.npy
  fastvgg info train.npy

All verbs: fastvgg --help. All of one: fastvgg preprocess --help.
A run that was cut off goes on when the same command is given again."""
