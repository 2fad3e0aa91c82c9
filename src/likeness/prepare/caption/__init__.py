"""Captions for a prepared folder, by a vision-language model with checks, or by a grammar over attributes.

`folder` captions a folder. A caption passes through:

- `prompts`: the questions; `models`: a model behind an endpoint (`likeness.chat`) or in a checkpoint
- `rules`: removes text that is not a caption and shortens long ones
- `refine`: removes claims that the attributes or the mask contradict
- `grammar`: captions without a model, from CelebA's attributes
- `records`: stores answers and the origin of every caption
"""
