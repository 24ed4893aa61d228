"""SGLang: how a server is started, asked for tokens and controlled. The servers themselves are unmodified."""
