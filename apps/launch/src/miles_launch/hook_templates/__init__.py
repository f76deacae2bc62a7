"""Files that `miles hooks --new` prints: each works as it is. They are text; nothing imports them."""
