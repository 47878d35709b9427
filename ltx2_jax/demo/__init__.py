"""Small stand-ins for films, released codecs and Gemma: what the quickstart needs, made here."""
