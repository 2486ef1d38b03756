"""Two processes that train one run, as experiments.launch.local would start them."""

import subprocess

from experiments.launch import local

PROMISED_SECONDS = 15
"""In which both of two processes end when one fails."""


def start(command, environ):
    """Starts a command as two processes of one device each; stderr goes with stdout."""
    return [
        subprocess.Popen(
            command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for own in local.environments(local.Settings(2, 1), environ)
    ]


def ended(children, seconds=PROMISED_SECONDS):
    """What each printed; they have to end in time."""
    try:
        return [child.communicate(timeout=seconds)[0] for child in children]
    finally:
        for child in children:
            child.kill()
