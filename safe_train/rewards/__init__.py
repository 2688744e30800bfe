"""What completions are worth: functions, classifiers, servers, and how several become one."""
