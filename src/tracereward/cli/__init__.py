"""The command line."""

from tracereward.cli.app import main as main
