"""A folder of files as samples: what lies in it, which caption goes with which file, and what of it is held out."""
