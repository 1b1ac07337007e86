// Writes to a session and watches it, while tests/client/test_node_client.py restarts the server.
//
//   node restarts.mjs ADDRESS OTHER_ADDRESS TENANT TOKEN_FILE
//
// Prints a line of JSON for each event of the watch and for each interruption. Reads a line to stop
// writing, and another to delete the session at OTHER_ADDRESS. Ends when the watch ends.
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'

import { ChatTicketClient } from 'chat-ticket-client'

const [address, otherAddress, tenant, tokenFile] = process.argv.slice(2)
const input = createInterface({ input: process.stdin })
const print = (value) => console.log(JSON.stringify(value, (_, each) => (typeof each === 'bigint' ? Number(each) : each)))

const client = new ChatTicketClient(address, {
  tenant,
  token: () => readFileSync(tokenFile, 'utf8'),
  timeoutMs: 2000,
  options: { 'grpc.initial_reconnect_backoff_ms': 100, 'grpc.max_reconnect_backoff_ms': 300 },
})
const other = new ChatTicketClient(otherAddress, { tenant })

async function retried(method, request) {
  for (;;) {
    try {
      return await client.retry(method, request)
    } catch (error) {
      if (error.reason !== 'CREDENTIAL_EXPIRED') throw error // the file has another token soon
      await sleep(50)
    }
  }
}

const sessionId = randomUUID()
await retried(client.sessions.createChatSession, { session: { id: sessionId } })

let isWriting = true
async function write() {
  const written = []
  while (isWriting) {
    const message = { id: randomUUID(), role: 'CHAT_MESSAGE_ROLE_USER', content: `${written.length}` }
    await retried(client.messages.createChatMessage, { sessionId, message })
    written.push(message.id)
    await sleep(10)
  }
  return written
}

async function watch() {
  const onInterruption = ({ revision, message }) => print({ interruption: message, revision })
  for await (const { event, revision } of client.watch(sessionId, { onInterruption })) {
    print({ event: event.$case, revision, messages: event.value.messages?.map(({ id, sequence }) => [id, sequence]) })
  }
}

const watching = watch()
const writing = write()
await once(input, 'line')
isWriting = false
print({ written: await writing })
await once(input, 'line')
await other.sessions.deleteChatSession({ sessionId })
print({ deleted: true })
await watching
client.close()
other.close()
input.close()
