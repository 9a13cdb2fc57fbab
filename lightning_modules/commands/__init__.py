"""What the commands do: fuse, transfer, convert, export, and the records and figures that they write."""
