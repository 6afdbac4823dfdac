"""A layer of experts spread over ranks: how tokens reach their experts, what that costs, where experts should stand."""
