"""Captions of a prepared folder: by a vision-language model that is checked, or by a grammar over known attributes.

`stage` runs all of it; in the order of what happens to a caption:

- `prompts`: what is asked; `models`: whom, by way of an `endpoint` or a `checkpoint`
- `rules`: what is no caption is taken out, what is too long is cut
- `refine`: what the attributes or the mask contradict is taken out
- `grammar`: captions without any model, from CelebA's attributes
- `records`: what was answered and where every caption comes from
"""
