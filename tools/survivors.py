"""x"""

EXPLAINED = {}
