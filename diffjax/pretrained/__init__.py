"""Published weights in and out: downloads, files, and tables of foreign names.

A file is fetched and verified by its hash (`downloads`), read without running it, tensor by tensor
(`files`, `torch_files`), and its tensors become parameters by the table of a network (`tables`,
`transforms`), in both directions. `family` joins a network's sizes and its table.
"""
