"""Reports: each reads the one result object and writes it for somebody else. No framework here."""
