"""The commands fuse, transfer, convert and export, and the records and figures that they write."""
