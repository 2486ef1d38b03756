"""The command line: one module a command, with its flags, its text and its function.

Experiments use ``experiment`` and ``flags``; nothing else imports this package.
"""
