"""Everything that one GPU is asked, in nine minutes; see README.md in this folder."""
