"""Training: a config goes down, from the loop to the step.

``loop.train_and_evaluate(config, workdir)`` reads from top to bottom:

1. ``workdir``: whether a run of this config fits in the directory, which is claimed for it.
2. ``setup``: ``checks`` the config, opens the data, builds model, optimizer and ``initial_state``.
3. ``resume``: puts the newest checkpoint into the run, if there is one.
4. ``step_programs``: compiles ``step.train_step`` and ``step.eval_step`` for the mesh.
5. ``loop``: takes the steps; logs, evaluates, saves, and stops at a signal.
6. ``loop.conclude``: figures, the closing table, result.json.
"""
