"""The playground: one prompt, edits as controls, and what they do to the image, in a browser (docs/playground.md).

`controls` derives a control from each argument of an op, `writing` turns the state of controls into a program and into
YAML, and `session` computes what is shown. These need no library of their own. `page` shows it with NiceGUI.
"""
