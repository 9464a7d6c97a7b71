"""``python -m tracereward``."""

from tracereward.cli import main

main()
