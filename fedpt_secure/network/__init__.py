"""A federation of real processes: what a server and its clients do, whatever carries their bytes.

    folder        where an organisation's files lie, and its settings
    local_socket  the Unix socket between a client's worker and what carries its messages
    transport     how a server reaches its clients
    service       a client's worker: the only process with its records, its keys and its bare update
    journal       a round on the server's disk, so that a killed server goes on with it
    coordinator   the server's run, round by round

Importing this package imports none of them: what carries messages starts in milliseconds and never loads a model.
"""
