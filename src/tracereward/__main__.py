"""``python -m tracereward``."""

from tracereward.cli.app import main

main()
