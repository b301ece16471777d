"""Walls around code and files of others: no secrets, Linux namespaces, children that a fork server makes."""
