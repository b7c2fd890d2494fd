/*
 * recorder.exe: stands in for accelerate.exe or python.exe and notes how it was called.
 *
 * Each call makes one new file, 0000, 0001, ..., in the folder named by the environment
 * variable RECORDER_LOG (made if it is not there). The file holds UTF-8 texts, each ended
 * by a NUL: the current directory, the number of arguments, the program and its arguments as the
 * C runtime splits them, then every NAME=value of the
 * environment. The exit code is RECORDER_EXIT_ and the program's name (RECORDER_EXIT_python), or
 * RECORDER_EXIT, or 0; 125 means that nothing was recorded.
 */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <stdio.h>
#include <stdlib.h>
#include <wchar.h>

#define CANNOT_RECORD 125
#define LONGEST_PATH 32768

static int fail(const char *what)
{
    fprintf(stderr, "recorder: cannot %s (error %lu)\n", what, GetLastError());
    return CANNOT_RECORD;
}

/* Write text as UTF-8 with its closing NUL. */
static BOOL put(HANDLE file, const wchar_t *text)
{
    int size = WideCharToMultiByte(CP_UTF8, 0, text, -1, NULL, 0, NULL, NULL);
    char *bytes = malloc((size_t)size);
    DWORD written = 0;
    BOOL done = bytes != NULL
        && WideCharToMultiByte(CP_UTF8, 0, text, -1, bytes, size, NULL, NULL) == size
        && WriteFile(file, bytes, (DWORD)size, &written, NULL);
    free(bytes);
    return done && written == (DWORD)size;
}

/* The first number that is free: CREATE_NEW makes two calls at once take different ones. */
static HANDLE new_record(const wchar_t *folder)
{
    static wchar_t path[LONGEST_PATH];
    HANDLE file = INVALID_HANDLE_VALUE;
    CreateDirectoryW(folder, NULL);
    for (int number = 0; number < 10000; number++) {
        _snwprintf(path, LONGEST_PATH - 1, L"%ls\\%04d", folder, number);
        file = CreateFileW(path, GENERIC_WRITE, 0, NULL, CREATE_NEW, FILE_ATTRIBUTE_NORMAL, NULL);
        if (file != INVALID_HANDLE_VALUE || GetLastError() != ERROR_FILE_EXISTS)
            break;
    }
    return file;
}

/* The exit code that the test asks of this program, or of any. */
static int exit_code(void)
{
    static wchar_t path[LONGEST_PATH], name[LONGEST_PATH], variable[LONGEST_PATH];
    wchar_t code[16];
    const DWORD size = sizeof code / sizeof *code;
    GetModuleFileNameW(NULL, path, LONGEST_PATH);
    _wsplitpath(path, NULL, NULL, name, NULL);
    _snwprintf(variable, LONGEST_PATH - 1, L"RECORDER_EXIT_%ls", name);
    if (!GetEnvironmentVariableW(variable, code, size)
        && !GetEnvironmentVariableW(L"RECORDER_EXIT", code, size))
        return 0;
    return (int)wcstoul(code, NULL, 10);
}

int wmain(int count, wchar_t **arguments)
{
    static wchar_t number[16], folder[LONGEST_PATH], cwd[LONGEST_PATH];
    const wchar_t *entry = GetEnvironmentStringsW();
    HANDLE file;

    /* Not _wgetenv: the C runtime may give what is left of a name in the ANSI code page. */
    if (!GetEnvironmentVariableW(L"RECORDER_LOG", folder, LONGEST_PATH))
        return fail("read RECORDER_LOG: it is not set");
    file = new_record(folder);
    if (file == INVALID_HANDLE_VALUE)
        return fail("make a file in the folder RECORDER_LOG");
    if (!GetCurrentDirectoryW(LONGEST_PATH, cwd))
        return fail("read the current directory");
    _snwprintf(number, 15, L"%d", count - 1);
    if (!put(file, cwd) || !put(file, number))
        return fail("write the record");
    for (int at = 0; at < count; at++)
        if (!put(file, arguments[at]))
            return fail("write the record");
    for (; *entry; entry += wcslen(entry) + 1)
        if (!put(file, entry))
            return fail("write the record");
    CloseHandle(file);
    return exit_code();
}
