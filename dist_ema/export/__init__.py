"""Consolidated safetensors checkpoints in the layout of the model's library.

Modules, from the bottom: `format` (files, headers, offsets), `layouts` (what each library reads),
`replace` (new files in the place of old ones), `writing` (values to their places in the files),
`live` (from the ranks that hold the average) and `offline` (from a sharded checkpoint, by one
process).
"""
