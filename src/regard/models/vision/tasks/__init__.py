"""Networks that answer more than which class a picture is of: places, counts, poses, matches between pictures."""
